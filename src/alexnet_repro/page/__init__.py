"""The report that people read: its content, figures and templates."""
