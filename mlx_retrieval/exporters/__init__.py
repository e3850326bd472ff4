"""Write a trained model as a folder that other libraries load, and compare the two before the folder appears."""
