"""One module per storage technology: what it knows of where images lie and what must hold there."""
