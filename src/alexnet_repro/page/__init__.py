"""The report page: content, figures and templates."""
