"""What many objects cost the operator."""
