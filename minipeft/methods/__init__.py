"""The methods, one file each, in the document's order."""
