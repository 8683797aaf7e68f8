"""The server: a tuned model behind the API that every client speaks, its web page, and what people make of answers."""
