"""An HTTP server over the decoding engine, that speaks as the API of OpenAI does, and a page to talk to the model."""
