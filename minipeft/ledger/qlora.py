"""The claims of the document's QLoRA section."""
