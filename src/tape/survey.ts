/** What a cartridge says it holds, from itself alone. */
import type { TapeDrive } from '../devices/tape/drive.js';
import { isKind } from '../errors.js';
import { ObjectKind, decodeObject } from '../format/object.js';
import type { KeyRing } from '../format/seal.js';
import {
  tapeName,
  tapeOfPayload,
  type TapeCartridge,
  type TapeFileId,
  type TapeLabel,
} from '../format/tape.js';
import { reachesFile } from './cartridge.js';
import { objectOfMember, readTapeFile, type TapeDamage } from './reader.js';

/** Files without anything that can be recognised, one after the other, that end a cartridge. */
export const MAX_SILENT_FILES = 2;

export interface Survey {
  /** Files with what they say they are, in order. */
  readonly files: readonly TapeFileId[];
  /** Objects of the directories and contents, without packs; of several copies the last good one. */
  readonly objects: ReadonlyMap<string, Buffer>;
  /** The packs of the directories: commits of points. */
  readonly packs: ReadonlyMap<string, Buffer>;
  readonly damage: readonly TapeDamage[];
  /** What its last good contents say of the cartridge itself. Undefined without keys, or where no contents can be read. */
  readonly record: TapeCartridge | undefined;
}

/**
 * Reads directories and contents and passes over the data. `keys`: to read the record of the cartridge; undefined where they are not known yet.
 */
export async function surveyCartridge(
  drive: TapeDrive,
  label: TapeLabel,
  repo: { readonly keys: KeyRing } | undefined,
): Promise<Survey> {
  const files: TapeFileId[] = [];
  const objects = new Map<string, Buffer>();
  const packs = new Map<string, Buffer>();
  const damage: TapeDamage[] = [];
  let record: TapeCartridge | undefined;
  // No mark behind the label: whoever wrote it was interrupted.
  if (!(await reachesFile(drive, 1))) return { files, objects, packs, damage, record };
  /** Files in a row that said nothing: what a drive may give out behind the end of data. */
  let silent = 0;
  for (let file = 1; silent < MAX_SILENT_FILES; file++) {
    const items = readTapeFile({
      drive,
      recordBytes: label.recordBytes,
      file,
      onDamage: (d) => damage.push(d),
    });
    let end = false;
    let skipped = false;
    silent++;
    for (;;) {
      const next = await items.next();
      if (next.done === true) {
        end = next.value.ended === 'end' || next.value.empty;
        break;
      }
      const item = next.value;
      silent = 0;
      if (item.kind === 'file') {
        files.push(item.id);
        if (item.id.kind !== 'data') continue;
        // On to the next mark without reading what lies between.
        skipped = true;
        break;
      }
      const name = objectOfMember(item.name);
      if (name === undefined) continue;
      if (name.startsWith('packs/')) {
        if (item.whole || !packs.has(name)) packs.set(name, item.data);
      } else if (item.whole) {
        objects.set(name, item.data);
        if (name === tapeName(label.label) && repo !== undefined) {
          try {
            const found = tapeOfPayload(
              decodeObject(ObjectKind.tape, name, item.data, repo.keys),
              name,
            );
            if (found.tape.cartridgeId === label.cartridgeId) record = found;
          } catch (error) {
            if (!isKind(error, 'damaged')) throw error;
          }
        }
      }
    }
    if (end) break;
    if (skipped) {
      try {
        await drive.spaceFiles(1);
      } catch (error) {
        if (!isKind(error, 'io') || !(await drive.status()).loaded) throw error;
        break; // no mark behind it: a session that was not finished
      }
    }
  }
  return { files, objects, packs, damage, record };
}
