"""Running a trained model: load its weights under any layout, decode text, fill blanks, use it as a plain torch module."""
