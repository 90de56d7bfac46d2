"""Review: select masks for correction, and apply the corrections."""
