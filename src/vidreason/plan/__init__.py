"""``vidreason plan``: tokens, steps and memory of a command or pipeline, before anything is loaded or trained."""
