/**
 * NBD: images as network block devices, with writable overlays. The rest of src/nbd is private to it. Who must start fast
 * imports ./server.js, and ./overlay.js when it is wanted, by themselves.
 */
export { withNbdExport, type WithNbdExportOptions } from './export.js';
export {
  makeOverlay,
  openOverlay,
  openTemporaryOverlay,
  type OpenOverlayOptions,
  type OverlayIdentity,
} from './overlay.js';
export {
  serveNbd,
  type NbdExport,
  type NbdLimits,
  type NbdListen,
  type NbdServer,
  type NbdServerOptions,
  type NbdTls,
} from './server.js';
export { isWritable, type WritableImage } from './writable.js';
