"""The OpenAI-compatible server, its web page, and what people made of the answers."""
