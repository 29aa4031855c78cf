"""The mini scale: generated scenes, and stand-ins for CLIP and Vicuna that read them."""
