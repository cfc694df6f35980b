/** Opens whatever a user names as a tape drive. */
import type { Clock } from '../../clock.js';
import type { TapeDrive } from './drive.js';
import { FileDrive, isFileDrive } from './file-drive.js';
import { StDrive } from './st.js';

/** `/dev/nst0`, or `file:PATH` for a directory or file that stands in for a cartridge. */
export function openTapeDrive(
  path: string,
  clock: Pick<Clock, 'sleep' | 'monotonicNs'>,
): Promise<TapeDrive> {
  return isFileDrive(path) ? FileDrive.open(path, clock) : StDrive.open(path, clock);
}
