/** The short way through a frame of one chunk lives where packs are read. */
export { ChunkRoom, SingleChunks } from '../repo/single-chunks.js';
