"""One module or package for each API: the native socket, REST, the AI SDK, OpenAI, health, and the page."""
