/** Copying into shared memory is for everybody. */
export { copyBytes } from '../memory-copy.js';
