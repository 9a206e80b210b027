"""Operations on compressed weights: one operation a file, each with a reference, a Triton kernel and CPU routes."""
