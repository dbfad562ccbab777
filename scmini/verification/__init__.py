"""The proof on the user's own machine that the fast way gives what plain PyTorch gives."""
