"""The claims of the document's AdaLoRA section."""
