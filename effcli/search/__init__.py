"""Choosing options of a pass layer by layer: what each costs, and the best choice under a budget."""
