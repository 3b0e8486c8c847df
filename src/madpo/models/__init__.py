"""Loading models, and computing with them."""
