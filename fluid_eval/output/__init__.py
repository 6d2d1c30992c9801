"""How results are shown: terminal, figures, tables, the HTML report."""
