"""The claims about what LoRA is compared with: Adapter, P-Tuning, and full training before LoRA."""
