"""An OpenAI-compatible server on the engine. `app.py` is where requests come in."""
