"""HF PEFT's files: their config, their rules, and adapters in them."""
