"""The report of a run, and the page parts it shares with other pages."""
