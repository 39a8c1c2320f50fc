"""Models: loading them, learning what flows through them, and naming their parts."""
