"""What two scripts share."""
