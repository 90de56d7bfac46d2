"""Tools that made the embedded weights and measure them; not part of the wheel."""
