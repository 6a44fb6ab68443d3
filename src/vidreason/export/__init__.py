"""``vidreason export``: a run as a folder that stock transformers, peft and vLLM load."""
