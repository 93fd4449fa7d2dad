pub(super) struct Random;
