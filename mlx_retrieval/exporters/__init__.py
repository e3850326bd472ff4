"""Write a trained model as folders that other libraries load, compared before they appear."""
