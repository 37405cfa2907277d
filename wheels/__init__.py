"""What builds, makes and checks the distributions. None of it is in a wheel."""
