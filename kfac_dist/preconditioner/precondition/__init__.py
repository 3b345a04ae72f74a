"""Gradients → owners → natural gradients of a bounded length → back."""
