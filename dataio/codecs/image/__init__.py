"""Images: what their header says, decoding to uint8, and the augmented batch that is made of them."""
