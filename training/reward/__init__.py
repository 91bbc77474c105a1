"""After stage 3: the noise predictor trained further by what rewards say of its own pictures."""
