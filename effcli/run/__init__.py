"""A run: the recipe, its plan, and the pipeline that carries it out."""
