"""The data that experiments read: images, text, and how they are batched."""
