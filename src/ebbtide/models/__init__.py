"""One model in memory: its configuration, its tokenizer, its sessions and their forward."""
