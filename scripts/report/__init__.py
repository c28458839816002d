"""Tables and figures from the records under results/."""
