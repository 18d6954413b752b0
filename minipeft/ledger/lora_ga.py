"""The claims of the document's LoRA-GA section."""
