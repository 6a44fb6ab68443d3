"""Reinforcement learning on rule rewards: rollouts, the policy loss, the reference policy and what is logged."""
