"""An HTTP server of OpenAI's protocol: routes, shapes of requests and answers, streaming, limits, a page."""
