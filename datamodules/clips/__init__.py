"""From a clip's file to a batch: decoding, frame sampling, order and collation."""
