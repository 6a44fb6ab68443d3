"""Reinforcement learning on rule rewards: rollouts, policy loss, reference policy and metrics."""
