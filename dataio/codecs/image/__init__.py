"""The codec of images: checks their headers, decodes them to uint8, and makes augmented batches. Imported by `dataio.codecs.make`."""
