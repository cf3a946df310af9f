"""An OpenAI-compatible server over what a run left."""
