"""Models at work: sampling, chat sessions, scores."""
