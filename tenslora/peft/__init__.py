"""PEFT: reading a LoRA that PEFT saved, and turning an adapter into a PEFT LoRA."""
