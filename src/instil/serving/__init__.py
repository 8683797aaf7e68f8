"""The model behind OpenAI's API, with a web page, and what people make of its answers."""
