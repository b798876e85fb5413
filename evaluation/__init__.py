"""What is measured of a network: numbers of an epoch, the evaluation of a checkpoint, predictions, clips, export."""
